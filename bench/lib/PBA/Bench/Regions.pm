package PBA::Bench::Regions;

# The compared ways to read a dirty bitmap, each as a side of PBA::Bench:
#
#   my $regions = PBA::Bench::Regions->new(server => $server, map => $map, dir => $directory);
#   $regions->one_by_one; $regions->in_batches; $regions->first;             # ours
#   $regions->nbdinfo; $regions->first_of_nbdinfo;                           # the peer
#   $regions->bare_loop; $regions->first_of_bare_loop;                       # the floor
#
# $server is a PBA::Bench::Server, $map what PBA::Bench::BigMap wrote.

use v5.36;

use Cwd ();
use File::Basename qw(dirname);

use PBA::Bench::Program;

my $batch = 10_000;
my $bare_loop = Cwd::abs_path(dirname(__FILE__) . '/../../../bare-loop.c');

sub new ($class, %options) { return bless {%options}, $class }

# ---- ours: loading the module is not measured, opening a volume is ----

sub _ours ($self, $code) {
    return {
        prepare => sub { require PVE::BackupAccess::Volume; return },
        run => sub ($) { return $code->($self->_open) },
    };
}

sub _open ($self) {
    return PVE::BackupAccess::Volume->open(
        'drive-scsi0',
        {
            size => $self->{map}{size},
            'bitmap-mode' => 'reuse',
            'bitmap-name' => $self->{map}{bitmap},
            'nbd-path' => $self->{server}->uri,
        },
    );
}

sub one_by_one ($self) {
    return $self->_ours(
        sub ($volume) {
            my ($regions, $bytes) = (0, 0);
            while (my ($offset, $length) = $volume->next_dirty_region) {
                $regions++;
                $bytes += $length;
            }
            return { regions => $regions, bytes => $bytes };
        }
    );
}

sub in_batches ($self) {
    return $self->_ours(
        sub ($volume) {
            my ($regions, $bytes) = (0, 0);
            while (my @regions = $volume->dirty_regions($batch)) {
                for (my $i = 1; $i < @regions; $i += 2) {
                    $regions++;
                    $bytes += $regions[$i];
                }
            }
            return { regions => $regions, bytes => $bytes };
        }
    );
}

# The length of the first region depends on the read-ahead, so only its offset is compared.
sub first ($self) {
    return $self->_ours(
        sub ($volume) {
            my ($offset) = $volume->next_dirty_region;
            return { regions => defined($offset) ? 1 : 0 };
        }
    );
}

# ---- the peer: nbdinfo's output, line by line ----

sub _start_nbdinfo ($self) {
    my ($context, $uri) = ($self->{server}->context, $self->{server}->uri);
    my $pid = open(my $lines, '-|', 'nbdinfo', "--map=$context", $uri)
        // die "cannot run nbdinfo: $!\n";
    return ($lines, $pid);
}

sub nbdinfo ($self) {
    my $run = sub ($) {
        my ($lines) = $self->_start_nbdinfo;
        my ($regions, $bytes) = (0, 0);
        while (my $line = <$lines>) {
            my ($offset, $length, $type) = $line =~ /^\s*(\d+)\s+(\d+)\s+(\d+)\s/
                or die "unexpected line from nbdinfo: $line";
            next if $type != 1;
            $regions++;
            $bytes += $length;
        }
        close($lines) or die "nbdinfo ended with status $?\n";
        return { regions => $regions, bytes => $bytes };
    };
    return { name => 'nbdinfo --map, line by line', run => $run };
}

sub first_of_nbdinfo ($self) {
    my $run = sub ($) {
        my ($lines, $pid) = $self->_start_nbdinfo;
        my $regions = 0;
        while (my $line = <$lines>) {
            next if $line !~ /^\s*\d+\s+\d+\s+1\s/;
            $regions = 1;
            last;
        }
        kill('TERM', $pid);
        close($lines);
        return { regions => $regions };
    };
    return { name => 'nbdinfo --map, line by line', run => $run };
}

# ---- the floor: the program measures itself, so its start is not counted ----

sub _run_bare_loop ($self, @more) {
    $self->{program} //= PBA::Bench::Program::compile($bare_loop, $self->{dir}, 'libnbd');
    my @arguments = ($self->{server}->uri, $self->{server}->context, @more);
    my ($regions, $bytes, $seconds, $rss_kib)
        = PBA::Bench::Program::figures($self->{program}, @arguments);
    return {
        counts => { regions => $regions, bytes => $bytes },
        seconds => $seconds,
        rss_kib => $rss_kib,
    };
}

sub bare_loop ($self) {
    return { name => 'bare C loop', run => sub ($) { $self->_run_bare_loop } };
}

sub first_of_bare_loop ($self) {
    my $run = sub ($) {
        my $result = $self->_run_bare_loop('first');
        $result->{counts} = { regions => $result->{counts}{regions} > 0 ? 1 : 0 };
        return $result;
    };
    return { name => 'bare C loop', run => $run };
}

# Dies if the sides agree on something that is not in the map.
sub check ($self, $counts) {
    my $map = $self->{map};
    for my $key (sort keys(%$counts)) {
        next if $counts->{$key} == $map->{$key};
        die "counted $counts->{$key} $key, but the map has $map->{$key}\n";
    }
    return;
}

1;
