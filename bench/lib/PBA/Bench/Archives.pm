package PBA::Bench::Archives;

# Archives of one disk, made in a directory by one of several ways: command, which is pve-backup-access as in a
# terminal; plain, our copy into an image without digests and checks; or borg, which reads the disk's file.
#
#   my $archives = PBA::Bench::Archives->new('command', dir => $dir, vm => $vm, file => $image);
#   $archives->next_backup;
#   $archives->backup;    # full if it is the first one in the directory, else incremental
#   my $bytes = $archives->bytes;
#
# Each step is a method, and not every way has every step: backup, lose_bitmap, verify, restore, prune. A step
# may run in another process, so only next_backup and begin_anew change the object.

use v5.36;

use File::Path ();
use FindBin;

use PBA::Bench::Archives::Borg;
use PBA::Bench::Archives::Command;
use PBA::Bench::Archives::Plain;

my %classes = map { lc($_) => "PBA::Bench::Archives::$_" } qw(Borg Command Plain);

sub new ($class, $kind, %options) {
    my $self = bless({ name => $kind, arguments => [], %options }, $classes{$kind});
    $self->begin_anew;
    return $self;
}

sub name ($self) { return $self->{name} }

sub begin_anew ($self) {
    File::Path::remove_tree($self->{dir});
    mkdir($self->{dir}) or die "$self->{dir}: $!\n";
    $self->{number} = 0;
    return;
}

sub next_backup ($self) { return $self->{number}++ }

# Makes the first archive, if there is none.
sub begin ($self) {
    return if $self->{number};
    $self->next_backup;
    $self->backup;
    return;
}

# What the archives take on the disk; holes do not count.
sub bytes ($self) {
    open(my $fh, '-|', 'du', '--summarize', '--block-size=1', $self->{dir}) or die "du: $!\n";
    my ($bytes) = (<$fh> // '') =~ m/^(\d+)/;
    close($fh) or die "du failed\n";
    return $bytes;
}

sub program ($self, @command) {
    open(my $fh, '-|', @command) or die "$command[0]: $!\n";
    my $text = join('', <$fh>);
    close($fh) or die "'@command' failed\n$text";
    return;
}

# An empty directory for a restored disk.
sub empty_directory ($self) {
    my $path = "$self->{dir}.restored";
    File::Path::remove_tree($path);
    mkdir($path) or die "$path: $!\n";
    return $path;
}

# The file that restore made, of which each program chooses the name.
sub restored_file ($self) {
    open(my $fh, '-|', 'find', "$self->{dir}.restored", '-type', 'f') or die "find: $!\n";
    chomp(my @files = <$fh>);
    close($fh) or die "find failed\n";
    return $files[0] // die "nothing was restored\n";
}

1;
