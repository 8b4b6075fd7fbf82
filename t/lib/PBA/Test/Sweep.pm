package PBA::Test::Sweep;

# One backup after another in which one thing goes wrong, while the guest writes. After each the
# guest runs, recover or the next setup by itself cleans up, and the next increment on the last good
# backup is the disk.
#
#   my $sweep = PBA::Test::Sweep->new(backend => $backend, seed => 1);
#   $sweep->run(name => ..., ids => [...], faults => [...], backup => sub ($point, $proxy) { ... });
#
# A row is one kind of backup; every fault of PBA::Test::QMPProxy happens at each place of it, or at so
# many places of it as points says (undef: all), chosen by the seed. backup makes it through the proxy
# and returns whether QEMU was told of a success after all data had been read. With ends_clean it leaves
# nothing that would be for recover.

use v5.36;

use File::Compare ();
use List::Util qw(min shuffle);
use Test::More ();

use PBA::Test::QMPProxy;
use PBA::Test::Repository;

my $block = 65536;

sub new ($class, %opt) {
    my $self = bless({ %opt, count => 0, writes => 0, outside => $opt{backend}->outside }, $class);
    $self->{repository} //= PBA::Test::Repository->new($opt{backend});
    return $self;
}

sub count ($self) { return $self->{count} }
sub backend ($self) { return $self->{backend} }
sub repository ($self) { return $self->{repository} }

sub run ($self, %row) {
    for my $fault ($row{faults}->@*) {
        for my $at ($self->_places($fault, \%row)) {
            my $struck = $self->_point($fault, $at, \%row) // return;
            last if $struck eq '' && !$row{points};
        }
    }
    return;
}

# How many there are is known from a backup in which nothing goes wrong.
sub _places ($self, $fault, $row) {
    return 1 .. 10_000 if !$row->{points};
    my $kind = $fault =~ m/-nbd\z/ ? 'nbd' : 'command';
    my $total = $row->{total}{$kind} //= scalar($self->_backup($fault, 0, $row)->records($kind));
    srand($self->{seed}++ + $self->{backend}->vm->version->[0]);    # each QEMU takes others
    my @places = shuffle(1 .. $total);
    return sort { $a <=> $b } @places[0 .. min($row->{points}, $total) - 1];
}

# One VM under one path, whatever the proxy does.
sub _proxy ($self, %fault) {
    my $backend = $self->{backend};
    return PBA::Test::QMPProxy->start(
        target => $backend->qmp_path,
        listen => $backend->vm->dir . '/proxy.qmp',
        %fault,
    );
}

# Returns the proxy that it went through.
sub _backup ($self, $fault, $at, $row) {
    my @ids = $row->{ids}->@*;
    $self->_before_backup(@ids);
    my $proxy = $self->_proxy(fault => $fault, at => $at);
    my $told = $row->{backup}->({ $row->%*, fault => $fault, at => $at }, $proxy);
    $self->{repository}->take_good(@ids) if $told;
    $self->{backend}->guest->stop_churn if !$at;
    $proxy->stop;
    return $proxy;
}

# Writes that no churn touches, at a place of their own each time.
sub write_more ($self, @ids) {
    my $backend = $self->{backend};
    for my $id (@ids) {
        my $blocks = $backend->vm->disk($id)->{size} / $block / 2;
        my $number = ++$self->{writes};
        my $offset = ($blocks + $number % $blocks) * $block;
        $backend->guest->write($id, $offset, $block, 1 + $number % 255);
    }
    return;
}

sub _before_backup ($self, @ids) {
    my $backend = $self->{backend};
    my $repository = $self->{repository};
    my @new = grep { !-e $repository->image($_) } @ids;
    $repository->backup(mode => 'new', success => 1, disks => \@new) if @new;
    $self->write_more(@ids);
    $backend->guest->start_churn(
        seed => ++$self->{churns},
        disks => \@ids,
        blocks => $backend->vm->disk($ids[0])->{size} / 4096 / 2,
        pause_us => 10_000,
    );
    return;
}

# Returns what was struck, '' for nothing, undef if something is wrong.
sub _point ($self, $fault, $at, $row) {
    my ($struck) = $self->_backup($fault, $at, $row)->records('fault');
    my $name = $struck ? $struck->{name} : '';
    my $clean = $self->_proxy;

    # Between any two steps of a backup it is once the one, once the other.
    my $by_recover = ($at + ($fault =~ m/after/)) % 2;
    my @problems = $row->{ends_clean} ? $self->{backend}->problems($self->{outside}) : ();
    push(@problems, $self->_recover($clean->socket_path)) if $by_recover;
    $self->{backend}->guest->stop_churn;
    push(@problems, $self->_next_increment($clean->socket_path, $by_recover, $row->{ids}->@*));
    $self->{count}++ if $name ne '';
    my $how = $by_recover ? 'recover' : 'the next setup';
    Test::More::is("@problems", '', "$row->{name}: $fault $name, number $at, $how");
    return @problems ? undef : $name;
}

sub _recover ($self, $path) {
    my @problems;
    my %options = ($self->{backend}->options(qmp => $path), log => sub { });
    eval { PVE::BackupAccess->recover(%options); 1 } or push(@problems, "recover: $@");
    push(@problems, $self->{backend}->problems($self->{outside}));
    my $again = eval { PVE::BackupAccess->recover(%options) } // [$@];
    push(@problems, "recover did something again: $again->@*") if $again->@*;
    return @problems;
}

sub _next_increment ($self, $path, $by_recover, @ids) {
    my ($backend, $repository) = $self->@{qw(backend repository)};
    my (@problems, @warnings);
    my $log = sub ($level, $text) { push(@warnings, $text) if $level eq 'warn' };
    my %backup = (mode => 'use', success => 1, disks => \@ids);
    eval { $repository->backup(%backup, options => { qmp => $path, log => $log }); 1 }
        or push(@problems, "the next backup: $@");
    push(@problems, "the next backup warns after recover: @warnings") if $by_recover && @warnings;
    push(@problems, $backend->problems($self->{outside}));
    for my $id (@ids) {
        push(@problems, "$id: what is restored is not the disk")
            if File::Compare::compare($repository->image($id), $backend->vm->raw_image($id)) != 0;
    }
    return @problems;
}

1;
