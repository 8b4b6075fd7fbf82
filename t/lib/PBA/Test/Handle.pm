package PBA::Test::Handle;

# Reads a volume of the mechanism file-handle as a provider that does not know this project: with sysseek and
# sysread in pieces of one size, and fallocate to discard. It has the methods of PVE::BackupAccess::Volume that
# PBA::Test::Repository uses.

use v5.36;

use Exporter qw(import);
use POSIX ();

our @EXPORT_OK = qw(fallocate);

my $PUNCH_HOLE_KEEP_SIZE = 3;
my %fallocate = (x86_64 => 285, aarch64 => 47);

sub new ($class, $volume, $piece) {
    return bless(
        {
            handle => $volume->{'file-handle'},
            next => $volume->{'next-dirty-region'},
            piece => $piece,
        },
        $class
    );
}

sub next_dirty_region ($self) { return $self->{next}->() }
sub close ($self) { }

# Reads exactly the range, or dies with $! at the end of the message.
sub pread ($self, $offset, $length) {
    my $data = '';
    sysseek($self->{handle}, $offset, 0) // die "sysseek: $!\n";
    while (length($data) < $length) {
        my $left = $length - length($data);
        my $size = $left < $self->{piece} ? $left : $self->{piece};
        my $got = sysread($self->{handle}, $data, $size, length($data));
        die "sysread: $!\n" if !defined($got);
        die "sysread: end of file\n" if !$got;
    }
    return $data;
}

sub discard ($self, $offset, $length) {
    fallocate($self->{handle}, $PUNCH_HOLE_KEEP_SIZE, $offset, $length) or die "fallocate: $!\n";
    return;
}

# Perl has no function for this system call.
sub fallocate ($handle, $mode, $offset, $length) {
    my $number = $fallocate{ (POSIX::uname())[4] } // die "fallocate has no number here\n";
    return syscall($number, fileno($handle), $mode, $offset, $length) == 0;
}

# ---- mounts and processes on the machine ----

# Mount points below a directory.
sub mounts ($class, $dir) {
    open(my $fh, '<', '/proc/self/mounts') or die "/proc/self/mounts: $!\n";
    return grep { m{\A\Q$dir\E/} } map { (split(/ /))[1] =~ s/\\(\d{3})/chr(oct($1))/ger } <$fh>;
}

# The PIDs of processes that serve files below a directory.
sub servers ($class, $dir) {
    my @found;
    for my $file (glob('/proc/[0-9]*/cmdline')) {
        open(my $fh, '<', $file) or next;
        my ($program, $path) = split(
            /\0/,
            do { local $/; <$fh> }
                // ''
        );
        push(@found, $file =~ m/(\d+)/)
            if ($path // '') =~ m{\A\Q$dir\E/} && $program =~ m{/pba-vfile\z};
    }
    return @found;
}

# Why this machine cannot serve files; undef if it can.
sub missing ($class) {
    open(my $fh, '+<', '/dev/fuse') or return "no /dev/fuse: $!";
    return undef;
}

1;
